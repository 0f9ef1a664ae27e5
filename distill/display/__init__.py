"""Tables, pictures of feature maps, and the templates of pages and model cards."""
