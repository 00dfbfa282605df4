"""How good a model is: the numbers, and tables and pictures of them."""
