"""The command line: a thin skin over `weightops.api`. Only this package prints, exits and reads the environment."""
