"""The road from a hospital's folder to a patch and back: fixed steps, not plug-ins."""
