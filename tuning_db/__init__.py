"""What is known about which config is fastest: the nouns, the SQLite store and the lookup ladder. Needs neither torch nor triton."""
