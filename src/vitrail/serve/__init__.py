"""``vitrail serve``: predictions and maps over HTTP, and the page that asks for them."""
