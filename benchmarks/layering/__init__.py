"""How quickly edges become layers, beside graph libraries written in other languages."""
