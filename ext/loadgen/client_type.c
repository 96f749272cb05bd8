#define PY_SSIZE_T_CLEAN
#include "client_type.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "client.h"
#include "traffic.h"

struct client_object {
    PyObject_HEAD struct client client;
    uint32_t is_initialised;
    uint32_t is_busy; /* atomic: a thread is in open, run, burst or close */
};

static struct client *client_of(PyObject *self) {
    return &((struct client_object *)self)->client;
}

/* ---- arguments ----------------------------------------------------------------------------- */

/* Raises ValueError and returns -1 unless the address is one of its family. */
static int read_address(union address *out, socklen_t *out_size, int family, const char *bytes,
                        Py_ssize_t size, int port, unsigned scope) {
    memset(out, 0, sizeof *out);
    out->any.sa_family = (sa_family_t)family;
    if (family == AF_INET && size == 4) {
        out->v4.sin_port = htons((uint16_t)port);
        memcpy(&out->v4.sin_addr, bytes, 4);
        *out_size = sizeof out->v4;
    } else if (family == AF_INET6 && size == 16) {
        out->v6.sin6_port = htons((uint16_t)port);
        out->v6.sin6_scope_id = scope;
        memcpy(&out->v6.sin6_addr, bytes, 16);
        *out_size = sizeof out->v6;
    } else if (family == AF_UNIX && size > 0 && size < (Py_ssize_t)sizeof out->local.sun_path) {
        memcpy(out->local.sun_path, bytes, (size_t)size);
        /* The name of an abstract socket ends where the address does: unix(7). */
        size_t closing = bytes[0] == '\0' ? 0 : 1;
        *out_size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + (size_t)size + closing);
    } else {
        PyErr_SetString(PyExc_ValueError, "the address does not fit its family");
        return -1;
    }
    return 0;
}

static int read_sources(struct settings *settings, int family, const char *bytes, Py_ssize_t size,
                        unsigned scope) {
    Py_ssize_t width = family == AF_INET ? 4 : 16;
    if (size == 0)
        return 0;
    if (family == AF_UNIX || size % width != 0) {
        PyErr_SetString(PyExc_ValueError, "the sources do not fit the address's family");
        return -1;
    }
    settings->source_count = (size_t)(size / width);
    settings->sources = calloc(settings->source_count, sizeof *settings->sources);
    if (settings->sources == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < settings->source_count; i++)
        if (read_address(&settings->sources[i], &settings->source_size, family,
                         bytes + (Py_ssize_t)i * width, width, 0, scope) < 0)
            return -1;
    return 0;
}

static int check_settings(const struct settings *settings, int mode) {
    const char *wrong = NULL;
    if (mode < 0 || mode >= MODES)
        wrong = "mode";
    else if (settings->connection_count < 1 || settings->connection_count > 1u << 24)
        wrong = "connections";
    else if (settings->connects_at_once < 1)
        wrong = "connects_at_once";
    else if (settings->length < 1 || settings->length > 1u << 30)
        wrong = "length";
    else if (settings->depth < 1)
        wrong = "depth";
    else if (settings->schedule_step < 1)
        wrong = "schedule";
    else if (!(settings->interval_ns >= 0))
        wrong = "interval_ns";
    else if (settings->datagrams && mode != MODE_CLOSED && mode != MODE_OPEN)
        wrong = "datagrams";
    else if (settings->datagrams && settings->line)
        wrong = "line";
    else if (settings->reconnect &&
             (settings->datagrams || (mode != MODE_CLOSED && mode != MODE_OPEN)))
        wrong = "reconnect";
    else if (settings->datagrams &&
             (settings->length < PAYLOAD_HEADER_BYTES || settings->length > BUFFER_BYTES))
        wrong = "length";
    if (wrong == NULL)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s is out of range", wrong);
    return -1;
}

static int client_object_init(PyObject *self, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {
        "mode",         "family",      "address",          "port",          "scope",     "sources",
        "first_number", "connections", "connects_at_once", "seed",          "length",    "depth",
        "timeout_ns",   "interval_ns", "schedule_first",   "schedule_step", "datagrams", "line",
        "verify",       "spin",        "close_by_reset",   "reconnect",     "keep_ends", NULL};
    struct settings settings = {0};
    int mode, family, port, datagrams, line, verify, spin, close_by_reset, reconnect, keep_ends;
    unsigned scope;
    const char *address, *sources;
    Py_ssize_t address_size, sources_size;
    unsigned long long timeout_ns, first, step;
    if (!PyArg_ParseTupleAndKeywords(
            arguments, keywords, "$iiy#iIy#IIIIIIKdKKppppppp:Client", names, &mode, &family,
            &address, &address_size, &port, &scope, &sources, &sources_size, &settings.first_number,
            &settings.connection_count, &settings.connects_at_once, &settings.seed,
            &settings.length, &settings.depth, &timeout_ns, &settings.interval_ns, &first, &step,
            &datagrams, &line, &verify, &spin, &close_by_reset, &reconnect, &keep_ends))
        return -1;
    struct client_object *object = (struct client_object *)self;
    if (object->is_initialised) {
        PyErr_SetString(PyExc_RuntimeError, "a client is set up once");
        return -1;
    }
    settings.mode = (enum mode)mode;
    settings.timeout_ns = timeout_ns;
    settings.schedule_first = first;
    settings.schedule_step = step;
    settings.datagrams = datagrams != 0;
    settings.line = line != 0;
    settings.verify = verify != 0;
    settings.spin = spin != 0;
    settings.close_by_reset = close_by_reset != 0;
    settings.reconnect = reconnect != 0;
    settings.keep_ends = keep_ends != 0 && family != AF_UNIX && !datagrams;
    if (check_settings(&settings, mode) < 0 ||
        read_address(&settings.server, &settings.server_size, family, address, address_size, port,
                     scope) < 0)
        return -1;
    if (read_sources(&settings, family, sources, sources_size, scope) < 0) {
        free(settings.sources);
        return -1;
    }
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

/* A call that runs the client: one at a time, without the GIL. */
static int enter(PyObject *self) {
    struct client_object *object = (struct client_object *)self;
    if (!object->is_initialised) {
        PyErr_SetString(PyExc_RuntimeError, "the client was never set up");
        return -1;
    }
    if (!atomic_u32_swap(&object->is_busy, 0, 1)) {
        PyErr_SetString(PyExc_RuntimeError, "the client is used by another thread");
        return -1;
    }
    return 0;
}

static PyObject *leave(PyObject *self, int result) {
    atomic_u32_store(&((struct client_object *)self)->is_busy, 0);
    if (result < 0) {
        errno = -result;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(adopt_doc, "adopt(fd, connect_ns)\n--\n\nTake over a socket as connection 0, on which "
                        "the first message has been echoed; before open().");

static PyObject *client_object_adopt(PyObject *self, PyObject *arguments) {
    int fd;
    unsigned long long connect_ns;
    if (!PyArg_ParseTuple(arguments, "iK:adopt", &fd, &connect_ns) || enter(self) < 0)
        return NULL;
    struct client *client = client_of(self);
    if (client->next_unopened > 0 || client->settings.datagrams) {
        leave(self, 0);
        PyErr_SetString(PyExc_ValueError, "the client has begun, or is one of datagrams");
        return NULL;
    }
    return leave(self, client_adopt(client, fd, connect_ns));
}

PyDoc_STRVAR(open_doc, "open()\n--\n\nEstablish every connection; return when each is open or has "
                       "failed.");

static PyObject *client_object_open(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    int result;
    if (enter(self) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    result = client_open(client_of(self));
    Py_END_ALLOW_THREADS;
    return leave(self, result);
}

PyDoc_STRVAR(run_doc, "run(start_ns, measure_ns, end_ns)\n--\n\nRun the workload; return when the "
                      "last reply has come or timed out.");

static PyObject *client_object_run(PyObject *self, PyObject *arguments) {
    unsigned long long start_ns, measure_ns, end_ns;
    int result;
    if (!PyArg_ParseTuple(arguments, "KKK:run", &start_ns, &measure_ns, &end_ns) || enter(self) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    result = client_run(client_of(self), start_ns, measure_ns, end_ns);
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
    result = client_burst(client_of(self), start_ns, measured != 0);
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

PyDoc_STRVAR(stop_doc, "stop()\n--\n\nMake open, run or burst return soon. Any thread.");

static PyObject *client_object_stop(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    client_stop(client_of(self));
    Py_RETURN_NONE;
}

/* Adds one number to a dict; -1 with an exception set on failure. */
static int set_number(PyObject *dict, const char *name, uint64_t number) {
    PyObject *value = PyLong_FromUnsignedLongLong(number);
    int result = value == NULL ? -1 : PyDict_SetItemString(dict, name, value);
    Py_XDECREF(value);
    return result;
}

PyDoc_STRVAR(counters_doc, "counters()\n--\n\nWhat has been counted so far; `errors` by kind. Any "
                           "thread, at any time.");

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

PyDoc_STRVAR(histogram_doc, "histogram(name)\n--\n\nCounter index -> count of one latency, as of "
                            "now. Any thread, at any time.");

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
             "samples()\n--\n\nThe last burst: connect, first echo and response time of each "
             "connection in ns, as uint64 triples; 0: did not get so far.");

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

PyDoc_STRVAR(take_ends_doc, "take_ends()\n--\n\nLocal ends of connections closed with FIN since "
                            "the last call: 16 bytes of address, 2 of port, 8 of "
                            "cookie each. One thread.");

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

PyDoc_STRVAR(first_error_doc, "first_error()\n--\n\nThe first error in full, or None; not while "
                              "the client runs.");

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

PyDoc_STRVAR(client_doc, "One thread's share of a workload; the arguments are in _loadgen.pyi.");

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
