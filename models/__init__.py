"""The small model that ships with the project, and the recipe that trained it."""
