"""Makes new rows with a teacher: a larger model behind an address (`edgetune augment`)."""
