#define PY_SSIZE_T_CLEAN
#include "client_type.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "client_arguments.h"
#include "connecting.h"
#include "run.h"

struct client_object {
    PyObject_HEAD struct client client;
    uint32_t is_initialised;
    uint32_t is_busy; /* atomic flag: a thread is in a call between enter and leave */
};

static struct client *client_of(PyObject *self) {
    return &((struct client_object *)self)->client;
}

static int client_object_init(PyObject *self, PyObject *arguments, PyObject *keywords) {
    struct client_object *object = (struct client_object *)self;
    struct settings settings = {0};
    if (object->is_initialised) {
        PyErr_SetString(PyExc_RuntimeError, "a client is initialised once");
        return -1;
    }
    if (client_arguments_read(arguments, keywords, &settings) < 0)
        return -1;
    int result = client_init(&object->client, &settings);
    object->is_initialised = 1;
    if (result < 0) {
        errno = -result;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    return 0;
}

static void client_object_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (((struct client_object *)self)->is_initialised)
        client_free(client_of(self));
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- methods ------------------------------------------------------------------------------- */

/* Begins a call that no other may overlap. Returns 0, or -1 with RuntimeError set. */
static int enter(PyObject *self) {
    struct client_object *object = (struct client_object *)self;
    if (!object->is_initialised) {
        PyErr_SetString(PyExc_RuntimeError, "the client is not initialised");
        return -1;
    }
    if (!atomic_u32_swap(&object->is_busy, 0, 1)) {
        PyErr_SetString(PyExc_RuntimeError, "another thread is using the client");
        return -1;
    }
    return 0;
}

/* Ends such a call. result: 0, which gives None, or -errno, which raises OSError. */
static PyObject *leave(PyObject *self, int result) {
    atomic_u32_store(&((struct client_object *)self)->is_busy, 0);
    if (result < 0) {
        errno = -result;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(adopt_doc, "adopt(fd, connect_ns)\n--\n\nTake over a socket as connection 0, before "
                        "open(). The first message has been echoed on it.");

static PyObject *client_object_adopt(PyObject *self, PyObject *arguments) {
    int fd;
    unsigned long long connect_ns;
    if (!PyArg_ParseTuple(arguments, "iK:adopt", &fd, &connect_ns) || enter(self) < 0)
        return NULL;
    struct client *client = client_of(self);
    if (client->next_unopened > 0 || client->settings.datagrams) {
        leave(self, 0);
        PyErr_SetString(PyExc_ValueError, "the client has opened connections, or uses datagrams");
        return NULL;
    }
    return leave(self, connecting_adopt(client, fd, connect_ns));
}

PyDoc_STRVAR(open_doc, "open()\n--\n\nEstablish every connection. Return when each is open or has "
                       "failed.");

static PyObject *client_object_open(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    int result;
    if (enter(self) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    result = run_open(client_of(self));
    Py_END_ALLOW_THREADS;
    return leave(self, result);
}

PyDoc_STRVAR(run_doc, "run(start_ns, measure_ns, end_ns)\n--\n\nRun the workload. Return when the "
                      "last reply has come or timed out.");

static PyObject *client_object_run(PyObject *self, PyObject *arguments) {
    unsigned long long start_ns, measure_ns, end_ns;
    int result;
    if (!PyArg_ParseTuple(arguments, "KKK:run", &start_ns, &measure_ns, &end_ns) || enter(self) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    result = run_workload(client_of(self), start_ns, measure_ns, end_ns);
    Py_END_ALLOW_THREADS;
    return leave(self, result);
}

PyDoc_STRVAR(burst_doc, "burst(start_ns, measured)\n--\n\nConnect, echo and close every "
                        "connection, all beginning at start_ns.");

static PyObject *client_object_burst(PyObject *self, PyObject *arguments) {
    unsigned long long start_ns;
    int measured, result;
    if (!PyArg_ParseTuple(arguments, "Kp:burst", &start_ns, &measured) || enter(self) < 0)
        return NULL;
    if (client_of(self)->settings.mode != MODE_BURST) {
        leave(self, 0);
        PyErr_SetString(PyExc_ValueError, "the client's mode is not burst");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    result = run_burst(client_of(self), start_ns, measured != 0);
    Py_END_ALLOW_THREADS;
    return leave(self, result);
}

PyDoc_STRVAR(close_doc, "close()\n--\n\nClose every connection.");

static PyObject *client_object_close(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    if (enter(self) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    client_close(client_of(self));
    Py_END_ALLOW_THREADS;
    return leave(self, 0);
}

PyDoc_STRVAR(stop_doc, "stop()\n--\n\nMake open, run and burst return soon. Any thread.");

static PyObject *client_object_stop(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    client_stop(client_of(self));
    Py_RETURN_NONE;
}

/* Adds one number to a dict. Returns -1 with an exception set on failure. */
static int set_number(PyObject *dict, const char *name, uint64_t number) {
    PyObject *value = PyLong_FromUnsignedLongLong(number);
    int result = value == NULL ? -1 : PyDict_SetItemString(dict, name, value);
    Py_XDECREF(value);
    return result;
}

PyDoc_STRVAR(counters_doc, "counters()\n--\n\nReturn the counters by name; `errors` is a dict by "
                           "kind. Any thread, at any time.");

static PyObject *client_object_counters(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    const struct client_counters *counters = &client_of(self)->counters;
    const struct {
        const char *name;
        const uint64_t *place;
    } all[] = {
        {"opened", &counters->opened},
        {"open_now", &counters->open_now},
        {"echoes", &counters->echoes},
        {"replies", &counters->replies},
        {"sent", &counters->sent},
        {"bytes_sent", &counters->bytes_sent},
        {"bytes_received", &counters->bytes_received},
        {"unanswered", &counters->unanswered},
        {"lost", &counters->lost},
        {"late", &counters->late},
        {"duplicates", &counters->duplicates},
        {"reordered", &counters->reordered},
        {"ended_ns", &counters->ended_ns},
        {"waited_ns", &counters->waited_ns},
        {"cpu_ns", &counters->cpu_ns},
        {"running_ns", &counters->running_ns},
        {"queued_ns", &counters->queued_ns},
        {"away_ns", &counters->away_ns},
        {"between_ns", &counters->between_ns},
        {"carried_in_ns", &counters->carried_in_ns},
        {"carried_out_ns", &counters->carried_out_ns},
        {"owed_half", &counters->owed_half},
        {"owed", &counters->owed},
        {"reconnects", &counters->reconnects},
        {"unended", &counters->unended},
    };
    PyObject *result = PyDict_New(), *errors = PyDict_New();
    if (result == NULL || errors == NULL || PyDict_SetItemString(result, "errors", errors) < 0)
        goto failed;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (set_number(result, all[i].name, atomic_u64_load_relaxed(all[i].place)) < 0)
            goto failed;
    for (size_t kind = 0; kind < ERROR_KINDS; kind++) {
        uint64_t number = atomic_u64_load_relaxed(&counters->errors[kind]);
        if (number > 0 && set_number(errors, error_names[kind], number) < 0)
            goto failed;
    }
    Py_DECREF(errors);
    return result;
failed:
    Py_XDECREF(result);
    Py_XDECREF(errors);
    return NULL;
}

PyDoc_STRVAR(histogram_doc, "histogram(name)\n--\n\nReturn the counts of one latency by counter "
                            "index. Any thread, at any time.");

static PyObject *client_object_histogram(PyObject *self, PyObject *name) {
    const char *wanted = PyUnicode_AsUTF8(name);
    if (wanted == NULL)
        return NULL;
    unsigned which = 0;
    while (which < LATENCIES && strcmp(latency_names[which], wanted) != 0)
        which++;
    if (which == LATENCIES || client_of(self)->histograms[which].counts == NULL)
        return PyErr_Format(PyExc_ValueError, "there is no latency %R", name);

    const uint64_t *counts = client_of(self)->histograms[which].counts;
    PyObject *result = PyDict_New();
    for (size_t index = 0; result != NULL && index < HISTOGRAM_LENGTH; index++) {
        uint64_t number = atomic_u64_load_relaxed(&counts[index]);
        if (number == 0)
            continue;
        PyObject *key = PyLong_FromSize_t(index), *value = PyLong_FromUnsignedLongLong(number);
        if (key == NULL || value == NULL || PyDict_SetItem(result, key, value) < 0)
            Py_CLEAR(result);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    return result;
}

PyDoc_STRVAR(samples_doc,
             "samples()\n--\n\nReturn connect, first echo and response time of each connection in "
             "the last burst, as triples of uint64 in ns; 0: not reached.");

static PyObject *client_object_samples(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    struct client *client = client_of(self);
    if (enter(self) < 0)
        return NULL;
    PyObject *result = PyBytes_FromStringAndSize(
        (const char *)client->samples,
        client->samples == NULL
            ? 0
            : (Py_ssize_t)(client->settings.connection_count * sizeof *client->samples));
    atomic_u32_store(&((struct client_object *)self)->is_busy, 0);
    return result;
}

PyDoc_STRVAR(take_ends_doc, "take_ends()\n--\n\nReturn the local ends of connections closed with "
                            "FIN since the last call: for each 16 bytes of address, 2 of port, 8 "
                            "of cookie. One thread.");

static PyObject *client_object_take_ends(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    struct client *client = client_of(self);
    if (client->ends == NULL)
        return PyBytes_FromStringAndSize("", 0);
    uint64_t most = atomic_u64_load_acquire(&client->ends_written) - client->ends_read;
    PyObject *result =
        PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(most * sizeof(struct local_end)));
    if (result != NULL)
        client_take_ends(client, (struct local_end *)PyBytes_AS_STRING(result), most);
    return result;
}

PyDoc_STRVAR(first_error_doc, "first_error()\n--\n\nReturn the first error in full, or None. Not "
                              "while the client runs.");

static PyObject *client_object_first_error(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    if (enter(self) < 0)
        return NULL;
    const struct first_error first = client_of(self)->first_error;
    atomic_u32_store(&((struct client_object *)self)->is_busy, 0);
    if (!first.happened)
        Py_RETURN_NONE;
    PyObject *result = Py_BuildValue("{s:s,s:i,s:I,s:K,s:I,s:K}", "kind", error_names[first.kind],
                                     "errno", first.error, "connection", first.connection,
                                     "sequence", (unsigned long long)first.sequence, "offset",
                                     first.offset, "at_ns", (unsigned long long)first.at_ns);
    if (result != NULL && first.has_bytes &&
        (set_number(result, "expected", first.expected) < 0 ||
         set_number(result, "found", first.found) < 0))
        Py_CLEAR(result);
    return result;
}

static PyMethodDef methods[] = {
    {"adopt", client_object_adopt, METH_VARARGS, adopt_doc},
    {"open", client_object_open, METH_NOARGS, open_doc},
    {"run", client_object_run, METH_VARARGS, run_doc},
    {"burst", client_object_burst, METH_VARARGS, burst_doc},
    {"close", client_object_close, METH_NOARGS, close_doc},
    {"stop", client_object_stop, METH_NOARGS, stop_doc},
    {"counters", client_object_counters, METH_NOARGS, counters_doc},
    {"histogram", client_object_histogram, METH_O, histogram_doc},
    {"samples", client_object_samples, METH_NOARGS, samples_doc},
    {"take_ends", client_object_take_ends, METH_NOARGS, take_ends_doc},
    {"first_error", client_object_first_error, METH_NOARGS, first_error_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(client_doc, "One thread's share of a workload. _loadgen.pyi has the arguments.");

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)client_doc},
    {Py_tp_init, client_object_init},
    {Py_tp_dealloc, client_object_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec client_type_spec = {
    .name = "kecho.bench._loadgen.Client",
    .basicsize = sizeof(struct client_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
