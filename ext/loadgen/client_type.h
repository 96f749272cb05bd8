/* The Python type _loadgen.Client: the only file pair that knows both Python and clients. */
#ifndef KECHO_LOADGEN_CLIENT_TYPE_H
#define KECHO_LOADGEN_CLIENT_TYPE_H

#include <Python.h>

extern PyType_Spec client_type_spec;

#endif
