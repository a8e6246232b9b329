"""Groups of commands, a file each: `app` is the group."""
