/* The arguments of _loadgen.Client, read into the settings of a client. */
#ifndef KECHO_LOADGEN_CLIENT_ARGUMENTS_H
#define KECHO_LOADGEN_CLIENT_ARGUMENTS_H

#include <Python.h>

#include "client.h"

/* Fills `settings`, which is all zero. Returns 0, or -1 with an exception set: TypeError,
 * ValueError or MemoryError. After success the caller owns settings->sources. */
int client_arguments_read(PyObject *arguments, PyObject *keywords, struct settings *settings);

#endif
