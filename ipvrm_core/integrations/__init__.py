"""The method inside other frameworks; each module imports its host when it is used, not before."""
