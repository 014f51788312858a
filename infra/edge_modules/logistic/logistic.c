/* Logistic regression by minibatch gradient descent: a training module for edge devices (WASI preview 1).

   In, all from the environment:
     ROUND_ID      required
     MODEL_URI     echoed as base_model_uri
     PROPLET_ID    the device; "proplet-unknown" when it is not given
     HYPERPARAMS   {"epochs": 1, "lr": 0.01, "batch_size": 16, "mu": 0}, any of them; mu is the proximal term of FedProx
     MODEL_DATA    {"w": [..], "b": ..} of any dimension; zeros when it is not given; other keys are copied to the update
     DATASET_DATA  {"data": [{"x": [..], "y": 0 or 1}, ..]}, other keys are skipped
   Out: one JSON object on stdout, keys in order. A message on stderr and exit code 1 for whatever is wrong.

   One step, over the samples of a batch B in the order of the data set, with p = 1 / (1 + exp(-(w x + b))):
     w -= lr * (sum_B (p - y) x / |B| + mu (w - w0)),   b -= lr * (sum_B (p - y) / |B| + mu (b - b0))
   The same input gives the same output to the last bit. */

#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_DEPTH 64              /* of nested JSON: the reader calls itself once a level */
#define MAX_COUNT 2147483647.0    /* largest epochs and batch_size */

static _Noreturn void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

/* Memory */

static void *enlarged(void *old, size_t count, size_t size) {
    void *block = count > SIZE_MAX / size ? NULL : realloc(old, count * size);
    if (block == NULL) fail("out of memory: %zu items of %zu bytes", count, size);
    return block;
}

typedef struct { double *at; size_t count, room; } numbers;

static void append(numbers *list, double value) {
    if (list->count == list->room) {
        list->room = list->room ? 2 * list->room : 64;
        list->at = enlarged(list->at, list->room, sizeof(double));
    }
    list->at[list->count++] = value;
}

/* JSON, strictly as in RFC 8259. `at` never passes `end`. */

typedef struct { const char *name, *start, *at, *end; } reader;
typedef struct { const char *at; size_t length; } slice;

static reader reader_of(const char *name, const char *text) {
    return (reader){name, text, text, text + strlen(text)};
}

static _Noreturn void malformed(const reader *r, const char *expected) {
    fail("%s: malformed JSON at byte %zu: expected %s", r->name, (size_t)(r->at - r->start), expected);
}

static int peek(reader *r) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r')) r->at++;
    return r->at < r->end ? (unsigned char)*r->at : -1;
}

static void expect(reader *r, char wanted, const char *expected) {
    if (peek(r) != wanted) malformed(r, expected);
    r->at++;
}

/* True while there is another member before `close`; reads the comma before it, or `close` itself. */
static bool another(reader *r, bool first, char close, const char *expected) {
    if (peek(r) == close) {
        r->at++;
        return false;
    }
    if (!first) expect(r, ',', expected);
    return true;
}

static bool is_digit(const reader *r) { return r->at < r->end && *r->at >= '0' && *r->at <= '9'; }

static void digits(reader *r) {
    if (!is_digit(r)) malformed(r, "a digit");
    while (is_digit(r)) r->at++;
}

static double number(reader *r) {
    peek(r);
    const char *begin = r->at;
    if (r->at < r->end && *r->at == '-') r->at++;
    if (r->at < r->end && *r->at == '0') r->at++;
    else if (is_digit(r)) digits(r);
    else malformed(r, "a number");
    if (is_digit(r)) malformed(r, "no digit after a leading 0");
    if (r->at < r->end && *r->at == '.') { r->at++; digits(r); }
    if (r->at < r->end && (*r->at == 'e' || *r->at == 'E')) {
        r->at++;
        if (r->at < r->end && (*r->at == '+' || *r->at == '-')) r->at++;
        digits(r);
    }
    double value = strtod(begin, NULL); /* the text ends in a zero byte, and only what it takes as a number was read */
    if (!isfinite(value)) malformed(r, "a number within double precision before here");
    return value;
}

static bool is_hex(int c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }

/* A string as it is written, without its quotes and with its escapes. */
static slice string(reader *r) {
    expect(r, '"', "a string");
    const char *begin = r->at;
    for (; r->at < r->end && *r->at != '"'; r->at++) {
        if ((unsigned char)*r->at < 0x20) malformed(r, "no control character in a string");
        if (*r->at != '\\') continue;
        r->at++;
        if (r->at == r->end || strchr("\"\\/bfnrtu", *r->at) == NULL) malformed(r, "an escape");
        if (*r->at != 'u') continue;
        for (int i = 0; i < 4; i++) {
            r->at++;
            if (r->at == r->end || !is_hex(*r->at)) malformed(r, "four hex digits");
        }
    }
    if (r->at == r->end) malformed(r, "the end of a string");
    return (slice){begin, (size_t)(r->at++ - begin)};
}

static slice key(reader *r) {
    slice name = string(r);
    expect(r, ':', "a colon");
    return name;
}

static bool is(slice s, const char *text) { return s.length == strlen(text) && memcmp(s.at, text, s.length) == 0; }

static void word(reader *r, const char *text) {
    size_t length = strlen(text);
    if ((size_t)(r->end - r->at) < length || memcmp(r->at, text, length) != 0) malformed(r, "a value");
    r->at += length;
}

/* Any value, checked and skipped; what it is written as. */
static slice skipped(reader *r, int depth) {
    if (depth > MAX_DEPTH) malformed(r, "less nesting");
    int next = peek(r);
    const char *begin = r->at;
    if (next == '{') {
        r->at++;
        for (bool first = true; another(r, first, '}', "a comma or }"); first = false) { key(r); skipped(r, depth + 1); }
    } else if (next == '[') {
        r->at++;
        for (bool first = true; another(r, first, ']', "a comma or ]"); first = false) skipped(r, depth + 1);
    } else if (next == '"') string(r);
    else if (next == 't') word(r, "true");
    else if (next == 'f') word(r, "false");
    else if (next == 'n') word(r, "null");
    else number(r);
    return (slice){begin, (size_t)(r->at - begin)};
}

static void number_list(reader *r, numbers *list) {
    expect(r, '[', "a list of numbers");
    for (bool first = true; another(r, first, ']', "a comma or ]"); first = false) append(list, number(r));
}

static void finish(reader *r) {
    if (peek(r) != -1) malformed(r, "nothing after the value");
}

/* What is trained, and on what */

typedef struct { slice key, value; } member;
typedef struct { numbers w; double b; bool has_w, has_b; member *extra; size_t extras; } model;
typedef struct { double epochs, lr, batch_size, mu; } hyperparameters;
typedef struct { numbers x, y; size_t features; } dataset; /* x: rows one after another */

static void once(bool *seen, const reader *r, const char *name) {
    if (*seen) fail("%s: %s is given twice", r->name, name);
    *seen = true;
}

static int by_key(const void *a, const void *b) {
    const slice *p = &((const member *)a)->key, *q = &((const member *)b)->key;
    size_t shorter = p->length < q->length ? p->length : q->length;
    int order = memcmp(p->at, q->at, shorter);
    return order ? order : (p->length > q->length) - (p->length < q->length);
}

static model read_model(const char *text) {
    model m = {0};
    reader r = reader_of("MODEL_DATA", text);
    expect(&r, '{', "an object");
    for (bool first = true; another(&r, first, '}', "a comma or }"); first = false) {
        slice name = key(&r);
        if (is(name, "w")) { once(&m.has_w, &r, "w"); number_list(&r, &m.w); }
        else if (is(name, "b")) { once(&m.has_b, &r, "b"); m.b = number(&r); }
        else {
            m.extra = enlarged(m.extra, m.extras + 1, sizeof(member));
            m.extra[m.extras++] = (member){name, skipped(&r, 1)};
        }
    }
    finish(&r);
    if (m.has_w && m.w.count == 0) fail("MODEL_DATA: w is empty: expected one number for each feature");
    return m;
}

static double read_setting(reader *r, const char *name, double low, double high, bool whole) {
    double value = number(r);
    if (!(value >= low && value <= high) || (whole && value != floor(value)))
        fail("HYPERPARAMS: %s = %.17g: expected %s from %.17g to %.17g", name, value, whole ? "an integer" : "a number",
             low, high);
    return value;
}

static hyperparameters read_hyperparameters(const char *text) {
    hyperparameters h = {1, 0.01, 16, 0};
    reader r = reader_of("HYPERPARAMS", text);
    expect(&r, '{', "an object");
    for (bool first = true; another(&r, first, '}', "a comma or }"); first = false) {
        slice name = key(&r);
        if (is(name, "epochs")) h.epochs = read_setting(&r, "epochs", 1, MAX_COUNT, true);
        else if (is(name, "batch_size")) h.batch_size = read_setting(&r, "batch_size", 1, MAX_COUNT, true);
        else if (is(name, "lr")) h.lr = read_setting(&r, "lr", 1e-300, 1e300, false);
        else if (is(name, "mu")) h.mu = read_setting(&r, "mu", 0, 1e300, false);
        else {
            skipped(&r, 1);
            fprintf(stderr, "HYPERPARAMS: %.*s is not used here\n", (int)(name.length < 64 ? name.length : 64), name.at);
        }
    }
    finish(&r);
    return h;
}

static void read_sample(reader *r, dataset *d) {
    bool has_x = false, has_y = false;
    size_t before = d->x.count, row = d->y.count;
    expect(r, '{', "a sample");
    for (bool first = true; another(r, first, '}', "a comma or }"); first = false) {
        slice name = key(r);
        if (is(name, "x")) { once(&has_x, r, "x"); number_list(r, &d->x); }
        else if (is(name, "y")) { once(&has_y, r, "y"); append(&d->y, number(r)); }
        else skipped(r, 3);
    }
    if (!has_x || !has_y) fail("DATASET_DATA: data[%zu] has no %s", row, has_x ? "y" : "x");
    double y = d->y.at[row];
    if (y != 0 && y != 1) fail("DATASET_DATA: data[%zu].y = %.17g: expected 0 or 1", row, y);
    size_t features = d->x.count - before;
    if (row == 0) d->features = features;
    if (features == 0 || features != d->features)
        fail("DATASET_DATA: data[%zu].x has %zu numbers: expected as many as data[0].x, at least one", row, features);
}

static dataset read_dataset(const char *text) {
    dataset d = {0};
    bool seen = false;
    reader r = reader_of("DATASET_DATA", text);
    expect(&r, '{', "an object");
    for (bool first = true; another(&r, first, '}', "a comma or }"); first = false) {
        if (!is(key(&r), "data")) { skipped(&r, 1); continue; }
        once(&seen, &r, "data");
        expect(&r, '[', "a list of samples");
        for (bool start = true; another(&r, start, ']', "a comma or ]"); start = false) read_sample(&r, &d);
    }
    finish(&r);
    if (d.y.count == 0) fail("DATASET_DATA: no samples: expected data: [{\"x\": [..], \"y\": 0 or 1}, ..]");
    return d;
}

/* Learning */

static double score(const model *m, const double *x) {
    double z = m->b;
    for (size_t j = 0; j < m->w.count; j++) z += m->w.at[j] * x[j];
    return z;
}

/* Mean log loss; the form of log(1 + exp(z)) that neither overflows nor loses small terms. */
static double loss(const model *m, const dataset *d) {
    double sum = 0;
    for (size_t i = 0; i < d->y.count; i++) {
        double z = score(m, d->x.at + i * d->features);
        sum += fmax(z, 0) - d->y.at[i] * z + log1p(exp(-fabs(z)));
    }
    return sum / (double)d->y.count;
}

static void step(model *m, const double *anchor, double anchor_b, const dataset *d, size_t from, size_t to,
                 double *gradient, const hyperparameters *h) {
    double gradient_b = 0, count = (double)(to - from);
    memset(gradient, 0, m->w.count * sizeof(double));
    for (size_t i = from; i < to; i++) {
        const double *x = d->x.at + i * d->features;
        double error = 1 / (1 + exp(-score(m, x))) - d->y.at[i];
        for (size_t j = 0; j < m->w.count; j++) gradient[j] += error * x[j];
        gradient_b += error;
    }
    for (size_t j = 0; j < m->w.count; j++)
        m->w.at[j] -= h->lr * (gradient[j] / count + h->mu * (m->w.at[j] - anchor[j]));
    m->b -= h->lr * (gradient_b / count + h->mu * (m->b - anchor_b));
}

static void train(model *m, const dataset *d, const hyperparameters *h) {
    size_t size = m->w.count * sizeof(double);
    double *anchor = enlarged(NULL, m->w.count, sizeof(double)), *gradient = enlarged(NULL, m->w.count, sizeof(double));
    double anchor_b = m->b;
    memcpy(anchor, m->w.at, size);
    size_t batch = h->batch_size < (double)d->y.count ? (size_t)h->batch_size : d->y.count;
    for (double epoch = 0; epoch < h->epochs; epoch++)
        for (size_t from = 0; from < d->y.count; from += batch) {
            size_t to = d->y.count - from < batch ? d->y.count : from + batch;
            step(m, anchor, anchor_b, d, from, to, gradient, h);
        }
    free(anchor);
    free(gradient);
}

/* Answer */

static void print_text(const char *text) {
    putchar('"');
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\') printf("\\%c", c);
        else if (c < 0x20) printf("\\u%04x", c);
        else putchar(c);
    }
    putchar('"');
}

static void print_update(model *m) {
    slice b = {"b", 1}, w = {"w", 1};
    m->extra = enlarged(m->extra, m->extras + 2, sizeof(member));
    m->extra[m->extras++] = (member){b, {NULL, 0}};
    m->extra[m->extras++] = (member){w, {NULL, 0}};
    qsort(m->extra, m->extras, sizeof(member), by_key);
    putchar('{');
    for (size_t i = 0; i < m->extras; i++) {
        member one = m->extra[i];
        printf("%s\"%.*s\":", i ? "," : "", (int)one.key.length, one.key.at);
        if (one.value.at != NULL) fwrite(one.value.at, 1, one.value.length, stdout);
        else if (is(one.key, "b")) printf("%.17g", m->b);
        else
            for (size_t j = 0; j < m->w.count; j++)
                printf("%s%.17g%s", j ? "," : "[", m->w.at[j], j + 1 == m->w.count ? "]" : "");
    }
    putchar('}');
}

static void check_keys(model *m) {
    qsort(m->extra, m->extras, sizeof(member), by_key);
    for (size_t i = 1; i < m->extras; i++)
        if (by_key(m->extra + i - 1, m->extra + i) == 0)
            fail("MODEL_DATA: %.*s is given twice", (int)m->extra[i].key.length, m->extra[i].key.at);
}

static void fit(model *m, const dataset *d) {
    check_keys(m);
    if (!m->has_w)
        for (size_t j = 0; j < d->features; j++) append(&m->w, 0);
    if (m->w.count != d->features)
        fail("MODEL_DATA: w has %zu numbers, the samples have %zu features", m->w.count, d->features);
}

static void check_trained(const model *m, double after, const hyperparameters *h) {
    bool finite = isfinite(m->b) && isfinite(after);
    for (size_t j = 0; j < m->w.count; j++) finite = finite && isfinite(m->w.at[j]);
    if (!finite) fail("training diverged: HYPERPARAMS lr = %.17g: expected a smaller one", h->lr);
}

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value != NULL && *value != 0 ? value : otherwise;
}

int main(void) {
    const char *round = setting("ROUND_ID", NULL);
    if (round == NULL) fail("Missing ROUND_ID environment variable");
    const char *data = setting("DATASET_DATA", NULL);
    if (data == NULL) fail("Missing DATASET_DATA environment variable");
    hyperparameters h = read_hyperparameters(setting("HYPERPARAMS", "{}"));
    model m = read_model(setting("MODEL_DATA", "{}"));
    dataset d = read_dataset(data);
    fit(&m, &d);
    fprintf(stderr, "Loaded dataset with %zu samples of %zu features\n", d.y.count, d.features);

    double before = loss(&m, &d);
    train(&m, &d, &h);
    double after = loss(&m, &d);
    check_trained(&m, before + after, &h);

    printf("{\"base_model_uri\":");
    print_text(setting("MODEL_URI", ""));
    printf(",\"metrics\":{\"loss\":%.17g,\"loss_before\":%.17g},\"num_samples\":%zu,\"proplet_id\":", after, before,
           d.y.count);
    print_text(setting("PROPLET_ID", "proplet-unknown"));
    printf(",\"round_id\":");
    print_text(round);
    printf(",\"update\":");
    print_update(&m);
    putchar('}');
    if (fflush(stdout) != 0) fail("stdout cannot be written");
    return 0;
}
