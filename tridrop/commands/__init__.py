"""The commands of ``tridrop`` on a terminal: tools beside the library, which nothing imports."""
