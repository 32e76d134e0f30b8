"""Label inference: the labels of private samples, from what crossed beside or because of them."""
