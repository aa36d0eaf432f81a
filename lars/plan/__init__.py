"""What a recipe will take on a cluster, before anybody pays for it."""
