def draw(r,d,p): pass
