"""Two small teachers that ship with the repository, and the commands that made them."""
