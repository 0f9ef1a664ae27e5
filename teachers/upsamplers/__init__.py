"""Ways to make a teacher's map denser."""
