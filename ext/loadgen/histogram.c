#include "histogram.h"

#include <errno.h>
#include <stdlib.h>

int histogram_open(struct histogram *histogram) {
    histogram->counts = calloc(HISTOGRAM_LENGTH, sizeof *histogram->counts);
    return histogram->counts == NULL ? -ENOMEM : 0;
}

void histogram_close(struct histogram *histogram) {
    free(histogram->counts);
    histogram->counts = NULL;
}
