def tables(r,d): return "x"
