def values(arguments):
    pass
