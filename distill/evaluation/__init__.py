"""How good a trained student is: measures, and the page that shows them."""
