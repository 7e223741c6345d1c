"""Which settings are best: the same concepts taught by several recipes, judged alike, and compared in pairs."""
