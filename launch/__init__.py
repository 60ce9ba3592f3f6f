"""Ray actors, placement, the command line and the offline API: everything a user starts. Imports runtime."""
