/* The Python type _loadgen.Client: its methods lock the client and release the GIL. */
#ifndef KECHO_LOADGEN_CLIENT_TYPE_H
#define KECHO_LOADGEN_CLIENT_TYPE_H

#include <Python.h>

extern PyType_Spec client_type_spec;

#endif
