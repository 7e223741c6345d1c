"""How good an adapter is: identity, prompt following, drift, diversity and copying, with intervals."""
