def write(path, outcome, config):
  pass
