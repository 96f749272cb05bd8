"""Facts of the machine: CPUs, kernel, network counters, sysctls, directories, names."""
