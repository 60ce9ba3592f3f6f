"""Several groups of ranks as replicas of one Ray Serve application, behind one front end."""
