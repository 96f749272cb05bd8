# Marks this directory as a package for cimport (include_path is ext/).
