"""Makes training rows from homes: invents homes, sentences about their devices, and the calls that they mean."""
