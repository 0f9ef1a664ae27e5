"""What training minimises: losses, their weights and the views that they compare."""
