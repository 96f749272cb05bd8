/* The module kecho.bench._loadgen: its functions, its type and its constants. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "client.h"
#include "client_type.h"
#include "histogram.h"
#include "payload.h"

PyDoc_STRVAR(histogram_index_doc,
             "histogram_index(value_ns)\n--\n\nReturn the index of the counter "
             "that a value is recorded in.");

static PyObject *module_histogram_index(PyObject *Py_UNUSED(module), PyObject *value) {
    unsigned long long value_ns = PyLong_AsUnsignedLongLong(value);
    if (value_ns == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromSize_t(
        histogram_index(value_ns < HISTOGRAM_HIGHEST ? value_ns : HISTOGRAM_HIGHEST));
}

PyDoc_STRVAR(payload_doc, "payload(seed, connection, sequence, length, line=False)\n--\n\nReturn "
                          "the bytes of one message.");

static PyObject *module_payload(PyObject *Py_UNUSED(module), PyObject *arguments) {
    struct message message;
    struct payload_seed seed;
    const char *seed_bytes;
    Py_ssize_t seed_size;
    unsigned long long sequence;
    int line = 0;
    if (!PyArg_ParseTuple(arguments, "y#IKI|p:payload", &seed_bytes, &seed_size,
                          &message.connection, &sequence, &message.length, &line))
        return NULL;
    if (seed_size != PAYLOAD_SEED_BYTES) {
        PyErr_SetString(PyExc_ValueError, "seed is out of range");
        return NULL;
    }
    payload_seed_read(&seed, seed_bytes);
    message.shown = seed.shown;
    message.key = &seed.key;
    message.line = line != 0;
    message.sequence = sequence;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, message.length);
    if (bytes != NULL)
        payload_fill((uint8_t *)PyBytes_AS_STRING(bytes), &message, 0, message.length);
    return bytes;
}

static PyMethodDef functions[] = {
    {"histogram_index", module_histogram_index, METH_O, histogram_index_doc},
    {"payload", module_payload, METH_VARARGS, payload_doc},
    {NULL, NULL, 0, NULL},
};

/* Adds a tuple of names to the module, in the order of their enum. Returns -1 with an exception set
 * on failure. */
static int add_names(PyObject *module, const char *name, const char *const *names, size_t count) {
    PyObject *tuple = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; tuple != NULL && i < count; i++) {
        PyObject *one = PyUnicode_FromString(names[i]);
        if (one == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, one);
    }
    int result = tuple == NULL ? -1 : PyModule_AddObjectRef(module, name, tuple);
    Py_XDECREF(tuple);
    return result;
}

static int module_exec(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &client_type_spec, NULL);
    int result = type == NULL ? -1 : PyModule_AddType(module, (PyTypeObject *)type);
    Py_XDECREF(type);
    if (result < 0 || add_names(module, "LATENCIES", latency_names, LATENCIES) < 0 ||
        add_names(module, "MODES", mode_names, MODES) < 0 ||
        PyModule_AddIntConstant(module, "SEED_BYTES", PAYLOAD_SEED_BYTES) < 0)
        return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "kecho.bench._loadgen",
    .m_doc = "The client threads of kecho.bench, in C.",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__loadgen(void) {
    return PyModuleDef_Init(&definition);
}
