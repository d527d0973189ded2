"""`course grade`: many learners' notebooks, checked unattended, and nobody's notebook can hurt anything."""
