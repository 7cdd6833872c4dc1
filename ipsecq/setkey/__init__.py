"""The language of setkey(8): parse, print, and apply as a whole or not at all."""
