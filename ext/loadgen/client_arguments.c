#define PY_SSIZE_T_CLEAN
#include "client_arguments.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "payload.h"

/* Reads the bytes of an address or path. Raises ValueError and returns -1 unless they fit the
 * family.
 */
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
        /* An abstract socket's name has no terminating zero: unix(7). */
        size_t closing = bytes[0] == '\0' ? 0 : 1;
        *out_size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + (size_t)size + closing);
    } else {
        PyErr_SetString(PyExc_ValueError, "the address does not fit its family");
        return -1;
    }
    return 0;
}

/* Reads packed addresses, one after the other, into settings->sources. Returns -1 with an exception
 * set on failure; settings->sources is the caller's to free, also then. */
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

/* Raises ValueError that names the first argument out of range, and returns -1. */
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

int client_arguments_read(PyObject *arguments, PyObject *keywords, struct settings *settings) {
    static char *names[] = {
        "mode",         "family",      "address",          "port",          "scope",     "sources",
        "first_number", "connections", "connects_at_once", "seed",          "length",    "depth",
        "timeout_ns",   "interval_ns", "schedule_first",   "schedule_step", "datagrams", "line",
        "verify",       "spin",        "close_by_reset",   "reconnect",     "keep_ends", NULL};
    int mode, family, port, datagrams, line, verify, spin, close_by_reset, reconnect, keep_ends;
    unsigned scope;
    const char *address, *sources, *seed;
    Py_ssize_t address_size, sources_size, seed_size;
    unsigned long long timeout_ns, first, step;
    if (!PyArg_ParseTupleAndKeywords(
            arguments, keywords, "$iiy#iIy#IIIy#IIKdKKppppppp:Client", names, &mode, &family,
            &address, &address_size, &port, &scope, &sources, &sources_size,
            &settings->first_number, &settings->connection_count, &settings->connects_at_once,
            &seed, &seed_size, &settings->length, &settings->depth, &timeout_ns,
            &settings->interval_ns, &first, &step, &datagrams, &line, &verify, &spin,
            &close_by_reset, &reconnect, &keep_ends))
        return -1;
    if (seed_size != PAYLOAD_SEED_BYTES) {
        PyErr_SetString(PyExc_ValueError, "seed is out of range");
        return -1;
    }
    payload_seed_read(&settings->seed, seed);
    settings->mode = (enum mode)mode;
    settings->timeout_ns = timeout_ns;
    settings->schedule_first = first;
    settings->schedule_step = step;
    settings->datagrams = datagrams != 0;
    settings->line = line != 0;
    settings->verify = verify != 0;
    settings->spin = spin != 0;
    settings->close_by_reset = close_by_reset != 0;
    settings->reconnect = reconnect != 0;
    settings->keep_ends = keep_ends != 0 && family != AF_UNIX && !datagrams;
    if (check_settings(settings, mode) < 0 ||
        read_address(&settings->server, &settings->server_size, family, address, address_size, port,
                     scope) < 0)
        return -1;
    if (read_sources(settings, family, sources, sources_size, scope) < 0) {
        free(settings->sources);
        return -1;
    }
    return 0;
}
