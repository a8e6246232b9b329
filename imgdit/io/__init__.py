"""Reading and writing files: text of any system, locks."""
