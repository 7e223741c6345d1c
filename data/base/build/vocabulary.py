"""What the world may contain: things by class noun, colours, materials, wearables, styles, and what is held out.

An entry `label>spoken` names a sprite by its emojibase label and says it in other words. Entries are separated by
semicolons. A label that a set lacks is skipped for that set.
"""

STYLES = {"noto": "noto", "twemoji": "twemoji", "fluent-emoji-flat": "flat", "noto-v1": "blob"}
"""Iconify set -> the word that captions use for it."""

HELD_STYLES = ("fluent-emoji", "openmoji", "emojione")
HELD = frozenset(
    [
        "fox",
        "robot",
        "teapot",
        "cactus",
        "backpack",
        "owl",
        "pizza",
        "snowman",
        "rocket",
        "teddy bear",
        "unicorn",
        "panda",
        "koala",
        "penguin",
        "hot dog",
        "guitar",
        "sailboat",
        "octopus",
        "strawberry",
        "lion",
        "alarm clock",
        "dragon face",
        "hamburger",
        "mushroom",
    ]
)
"""Never trained on, so that they can be taught; near twins (dragon, snowman without snow...) are left out as well."""

_ANIMALS = (
    "monkey face;monkey;gorilla;dog face;dog;poodle;wolf;raccoon;cat face;cat;black cat;tiger face;tiger;leopard;"
    "horse face;donkey;horse;zebra;deer;bison;cow face;cow;pig face;pig;boar;ram;ewe>sheep;goat;camel;llama;giraffe;"
    "elephant;mammoth;rhinoceros;hippopotamus;mouse face;mouse;hamster;rabbit face;rabbit;chipmunk>squirrel;hedgehog;"
    "bat;bear;polar bear;sloth;otter;skunk;kangaroo;badger;frog;crocodile;turtle;lizard;snake;sauropod>dinosaur;"
    "T-Rex>t-rex;beaver"
)
_BIRDS = (
    "turkey;chicken;rooster;hatching chick;baby chick;front-facing baby chick>chick;bird;dove;eagle;duck;swan;"
    "flamingo;peacock;parrot;dodo;goose"
)
_SEA = (
    "spouting whale;whale;dolphin;seal;fish;tropical fish;blowfish>pufferfish;shark;coral;crab;lobster;shrimp;squid;"
    "spiral shell>shell;jellyfish"
)
_SMILEYS = (
    "grinning face;grinning face with big eyes;beaming face with smiling eyes;"
    "rolling on the floor laughing>laughing face;"
    "face with tears of joy;slightly smiling face>smiling face;winking face;smiling face with halo;"
    "smiling face with hearts;smiling face with heart-eyes;star-struck>star-struck face;face blowing a kiss;"
    "kissing face;face savoring food;face with tongue;zany face;thinking face;neutral face;"
    "expressionless face;smirking face;unamused face;relieved face;sleeping face;drooling face;"
    "face with medical mask;nauseated face;hot face;cold face;exploding head;cowboy hat face;partying face;"
    "smiling face with sunglasses;nerd face;face with monocle;confused face;worried face;"
    "face with open mouth>surprised face;astonished face;flushed face;pleading face;crying face;loudly crying face;"
    "face screaming in fear>screaming face;yawning face;enraged face;angry face;smiling face with horns"
)
_PEOPLE = (
    "baby;boy;girl;man;woman;old man;old woman;man: beard>man with a beard;woman: red hair>woman with red hair;"
    "health worker>doctor;student;farmer;cook;mechanic;scientist;singer;artist;pilot;astronaut;firefighter;"
    "police officer;detective;guard;ninja;construction worker;prince;princess;Santa Claus>santa claus;superhero;"
    "mage>wizard;fairy;vampire;mermaid;elf;genie;zombie"
)

THINGS: dict[str, tuple[float, str]] = {
    "animal": (9.0, _ANIMALS),
    "bird": (2.6, _BIRDS),
    "sea animal": (2.4, _SEA),
    "bug": (
        1.4,
        "snail;butterfly;ant;honeybee>bee;lady beetle>ladybug;cricket;spider;caterpillar;bug>caterpillar",
    ),
    "creature": (1.4, "ghost;alien;goblin;ogre;skull;clown face;jack-o-lantern"),
    "smiley": (3.6, _SMILEYS),
    "person": (2.8, _PEOPLE),
    "flower": (1.6, "bouquet;cherry blossom;rose;hibiscus;sunflower;tulip;blossom;lotus"),
    "plant": (
        1.5,
        "seedling;potted plant;evergreen tree>pine tree;deciduous tree>tree;palm tree;four leaf clover;maple leaf;"
        "herb;Christmas tree>christmas tree",
    ),
    "fruit": (
        2.8,
        "grapes;melon;watermelon;tangerine;lemon;banana;pineapple;mango;red apple;green apple;pear;peach;"
        "cherries>cherry;blueberries;kiwi fruit;tomato;coconut",
    ),
    "vegetable": (
        1.6,
        "avocado;eggplant;potato;carrot;ear of corn>corn;hot pepper;cucumber;broccoli;garlic;onion;chestnut",
    ),
    "food": (
        2.2,
        "bread;croissant;pretzel;bagel;pancakes>pancake stack;waffle;cheese wedge>cheese;meat on bone;"
        "poultry leg>chicken leg;french fries;sandwich;taco;burrito;egg;popcorn;sushi;rice ball;fried shrimp;"
        "spaghetti;steaming bowl>bowl of noodles;bento box;dumpling;green salad>salad",
    ),
    "dessert": (
        2.2,
        "soft ice cream;ice cream;shaved ice;doughnut;cookie;birthday cake;shortcake;cupcake;pie;"
        "chocolate bar;candy;lollipop;custard;honey pot",
    ),
    "drink": (
        1.2,
        "baby bottle;glass of milk;hot beverage>cup of coffee;teacup without handle>cup of tea;wine glass;"
        "cocktail glass;tropical drink;beer mug;bubble tea;cup with straw",
    ),
    "building": (
        1.8,
        "house;house with garden;office building;hospital;school;factory;castle;church;mosque;hut;"
        "tent;circus tent;ferris wheel;fountain;classical building;Japanese castle>japanese castle;"
        "volcano;snow-capped mountain>mountain;Tokyo tower>tower",
    ),
    "vehicle": (
        3.4,
        "locomotive>steam train;high-speed train;tram;bus;ambulance;fire engine;police car;taxi;"
        "automobile>car;sport utility vehicle>jeep;pickup truck;delivery truck;tractor;racing car;motorcycle;"
        "motor scooter>scooter;bicycle;kick scooter;skateboard;auto rickshaw>rickshaw",
    ),
    "aircraft": (1.2, "airplane;small airplane;helicopter;flying saucer>ufo;satellite;parachute"),
    "boat": (1.0, "canoe;speedboat;passenger ship;ferry;ship;motor boat"),
    "weather sign": (
        1.2,
        "crescent moon;full moon face>moon with a face;sun;sun with face>sun with a face;star;ringed planet>planet;"
        "cloud;rainbow;umbrella;snowflake;fire;droplet>drop of water;cloud with lightning;tornado",
    ),
    "ball": (1.2, "soccer ball;baseball;basketball;volleyball;american football;tennis>tennis ball;bowling"),
    "toy": (
        1.6,
        "kite;yo-yo;game die;puzzle piece;balloon;nesting dolls;boxing glove;water pistol;bullseye;"
        "mirror ball;video game>game controller;piñata>pinata;magic wand",
    ),
    "instrument": (
        1.4,
        "saxophone;trumpet;accordion;violin;drum;musical keyboard>piano;banjo;maracas;harp;flute",
    ),
    "clothing": (
        2.2,
        "glasses;sunglasses;t-shirt;jeans;scarf;gloves;coat;socks;dress;kimono;handbag;running shoe>sneaker;"
        "hiking boot;high-heeled shoe;woman\u2019s boot>boot;crown;woman\u2019s hat>sun hat;top hat;graduation cap;"
        "billed cap>cap;necktie;ring;goggles;ribbon>bow",
    ),
    "tool": (
        1.4,
        "hammer;axe;dagger;shield;carpentry saw>saw;wrench;screwdriver;gear;magnet;ladder;scissors;key;"
        "bow and arrow;paintbrush;pencil;crayon;toolbox;shovel;kitchen knife;spoon",
    ),
    "machine": (
        1.6,
        "mobile phone;telephone;laptop;desktop computer;printer;camera;video camera;television;radio;"
        "microscope;telescope;light bulb;flashlight;microphone;headphone>headphones;film projector",
    ),
    "household object": (
        2.2,
        "door;window;bed;couch and lamp;chair;toilet;shower;bathtub;broom;basket;bucket;"
        "soap;toothbrush;fire extinguisher;shopping cart;candle;mirror;watch;hourglass done>hourglass;"
        "mantelpiece clock>clock;bell;luggage>suitcase;jar;amphora>vase;red paper lantern>lantern",
    ),
    "object": (
        3.0,
        "wrapped gift>gift;trophy;gem stone>diamond;closed book>book;open book;books>pile of books;scroll;"
        "newspaper;envelope;package>cardboard box;closed mailbox with raised flag>mailbox;briefcase;calendar;"
        "crystal ball;"
        "money bag;coin;artist palette;yarn;bomb;anchor;treasure chest;"
        "globe showing Americas>globe;moai>stone head;framed picture;locked>padlock;party popper;compass;"
        "red heart;yellow heart;blue heart;green heart;purple heart;broken heart;sparkling heart",
    ),
}
"""Class noun -> (how often, labels)."""

WEARERS = frozenset(
    [
        "monkey face",
        "dog face",
        "wolf",
        "raccoon",
        "cat face",
        "tiger face",
        "cow face",
        "pig face",
        "mouse face",
        "hamster",
        "rabbit face",
        "bear",
        "polar bear",
        "frog",
        "front-facing baby chick",
        "ghost",
        "alien",
        "skull",
        "clown face",
        "jack-o-lantern",
        "red apple",
        "tangerine",
        "lemon",
        "pear",
        "peach",
        "tomato",
        "coconut",
        "doughnut",
        "cookie",
        "cupcake",
        "egg",
        "onion",
        "grinning face",
        "grinning face with big eyes",
        "slightly smiling face",
        "winking face",
        "smiling face with heart-eyes",
        "neutral face",
        "kissing face",
        "face with open mouth",
        "angry face",
        "crying face",
        "zany face",
        "grinning face with smiling eyes",
        "moai",
        "balloon",
        "full moon face",
        "sun with face",
        "beaming face with smiling eyes",
        "face with tongue",
        "smirking face",
        "boy",
        "girl",
        "man",
        "woman",
        "baby",
        "old man",
        "old woman",
    ]
)
"""Things drawn as a face or a round body, on which a hat sits well."""

WEARABLES = {
    # label: (spoken, where it sits, width as a share of the wearer's)
    "crown": ("a crown", "top", 0.62), "top hat": ("a top hat", "top", 0.66),
    "graduation cap": ("a graduation cap", "top", 0.86),
    "billed cap": ("a cap", "top", 0.72), "woman\u2019s hat": ("a sun hat", "top", 0.86),
    "ribbon": ("a bow", "top", 0.52),
    "sunglasses": ("sunglasses", "eyes", 0.80), "glasses": ("glasses", "eyes", 0.80),
}  # fmt: skip

CONTAINERS = {
    # label: (spoken, where the thing's bottom is, where the front begins), both from -1 (top) to 1 of the sprite's box
    "bucket": ("a bucket", -0.1, -0.30), "basket": ("a basket", 0.25, 0.05), "bathtub": ("a bathtub", 0.3, 0.02),
    "teacup without handle": ("a cup", 0.0, -0.32), "shopping cart": ("a shopping cart", 0.1, -0.2),
}  # fmt: skip

HELD_IN_HAND = [
    "balloon",
    "wrapped gift",
    "lollipop",
    "rose",
    "tulip",
    "sunflower",
    "magic wand",
    "umbrella",
    "ice cream",
    "red heart",
    "banana",
    "carrot",
    "candle",
    "dagger",
    "shield",
    "key",
    "crystal ball",
    "trumpet",
    "star",
    "doughnut",
    "bubble tea",
    "pencil",
    "flashlight",
]
"""Small things that something else can hold."""

COLOURS = {
    "white": (252, 252, 252), "black": (28, 28, 32), "red": (220, 52, 54), "blue": (52, 116, 224),
    "green": (62, 168, 84), "yellow": (252, 214, 72), "orange": (247, 143, 48), "purple": (140, 84, 196),
    "pink": (250, 160, 192), "gray": (150, 152, 160), "brown": (136, 90, 60), "teal": (38, 168, 164),
}  # fmt: skip

TINTS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]] = {
    # spoken: the colours of shadows, of the middle and of highlights
    "red": ((70, 4, 12), (222, 44, 48), (255, 226, 220)),
    "blue": ((8, 20, 84), (48, 112, 226), (222, 238, 255)),
    "green": ((4, 48, 20), (54, 166, 76), (226, 252, 220)),
    "yellow": ((96, 62, 0), (250, 208, 50), (255, 252, 224)),
    "orange": ((92, 32, 0), (248, 136, 36), (255, 238, 214)),
    "purple": ((36, 8, 74), (142, 78, 204), (240, 226, 255)),
    "pink": ((104, 18, 62), (250, 136, 182), (255, 238, 246)),
    "teal": ((0, 48, 52), (32, 166, 160), (220, 252, 248)),
    "white": ((120, 124, 136), (238, 240, 246), (255, 255, 255)),
    "black": ((4, 4, 8), (44, 44, 52), (196, 196, 206)),
    "golden": ((92, 48, 0), (230, 170, 34), (255, 250, 200)),
    "silver": ((44, 48, 58), (168, 174, 186), (255, 255, 255)),
    "chocolate": ((34, 14, 6), (112, 62, 34), (222, 176, 140)),
    "ice": ((40, 110, 176), (150, 214, 244), (250, 255, 255)),
    "stone": ((46, 46, 44), (136, 134, 128), (222, 220, 212)),
    "candy": ((196, 40, 130), (255, 150, 200), (214, 250, 255)),
}
TINT_NAMES = list(TINTS)
MATERIALS = ("golden", "silver", "chocolate", "ice", "stone", "candy")
MADE_OF = {
    "golden": "gold",
    "silver": "silver",
    "chocolate": "chocolate",
    "ice": "ice",
    "stone": "stone",
    "candy": "candy",
}

TREATMENTS = {
    "none": (),
    "pixel": ("pixel art", "in pixel art style"),
    "gray": ("black and white", "in black and white"),
    "sketch": ("pencil sketch", "as a pencil sketch"),
    "sticker": ("sticker", "as a sticker"),
}
TREATMENT_NAMES = list(TREATMENTS)
