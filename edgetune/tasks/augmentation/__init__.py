"""Makes changed copies of training rows (the recipe key `data.augment`)."""
