"""The report of a bundle (`edgetune report`): training, answers, parity, boards; and its model card."""
