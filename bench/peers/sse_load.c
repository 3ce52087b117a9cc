/* Closed-loop load for a streaming chat completions endpoint, or for our REST: one thread, epoll, keep-alive connections.
 *
 *   cc -O2 -o sse_load sse_load.c
 *   sse_load PORT BODIES CONCURRENCY REQUESTS [rest]
 *
 * BODIES has one JSON body per line, used in turn. A request is good when its status is 200, no error event came, and
 * "data: [DONE]" (REST: `finished`) and the last chunk did. A token event is a `data:` event whose delta (REST: chunk)
 * has text; the first one ends the time to first token, so that an opening event without text counts for neither side.
 * SSE_QUICKACK=1 acknowledges every read at once (TCP_QUICKACK): without it a server that leaves Nagle's algorithm on
 * waits 40 ms for the client's delayed acknowledgement. Prints one JSON object.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define OPENAI_PATH "/v1/chat/completions"
#define REST_PATH "/mesh/v1/generate"
#define DEADLINE_S 120.0
#define LINE_MAX_BYTES 16384 /* what a longer line has beyond is not looked at */

enum state { HEAD, CHUNK_SIZE, CHUNK, CHUNK_END, LAST_END };

struct conn {
    int fd, waits_to_write, is_busy;
    enum state state;
    size_t out_sent, out_size;
    char *out;
    int status, done_seen, error_seen;
    long events, token_events, chunk_left;
    double sent_at, first_token_at;
    size_t line_size; /* of the header, chunk-size or event line that is not whole yet */
    char line[LINE_MAX_BYTES];
};

static struct sockaddr_in server;
static int epoll_fd, quickack, is_rest;
static char **bodies;
static size_t *body_sizes;
static long body_count, total, issued, ended, good, events, token_events, bytes;
static double *ttft_s, *latency_s;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void die(const char *what) {
    perror(what);
    exit(2);
}

static void watch(struct conn *c, int op) {
    struct epoll_event e = {.events = EPOLLIN | (c->waits_to_write ? EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(epoll_fd, op, c->fd, &e) < 0) die("epoll_ctl");
}

static void start(struct conn *c);

static void end(struct conn *c, int is_good) {
    ended++;
    c->is_busy = 0;
    if (is_good) {
        ttft_s[good] = c->first_token_at - c->sent_at;
        latency_s[good++] = now() - c->sent_at;
        events += c->events;
        token_events += c->token_events;
    } else {
        close(c->fd);
        c->fd = -1;
    }
    if (issued < total) start(c);
}

static void send_rest(struct conn *c) {
    while (c->out_sent < c->out_size) {
        ssize_t n = write(c->fd, c->out + c->out_sent, c->out_size - c->out_sent);
        if (n < 0 && errno == EAGAIN) {
            if (!c->waits_to_write) c->waits_to_write = 1, watch(c, EPOLL_CTL_MOD);
            return;
        }
        if (n < 0) {
            end(c, 0);
            return;
        }
        c->out_sent += n;
    }
    if (c->waits_to_write) c->waits_to_write = 0, watch(c, EPOLL_CTL_MOD);
}

static void start(struct conn *c) {
    if (c->fd < 0) {
        int on = 1;
        c->fd = socket(AF_INET, SOCK_STREAM, 0);
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (connect(c->fd, (struct sockaddr *)&server, sizeof server) < 0) die("connect");
        fcntl(c->fd, F_SETFL, O_NONBLOCK);
        c->waits_to_write = 0;
        watch(c, EPOLL_CTL_ADD);
    }
    long k = issued++ % body_count;
    c->out = realloc(c->out, body_sizes[k] + 512);
    int head = sprintf(c->out,
                       "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                       "Accept: text/event-stream\r\nContent-Length: %zu\r\n\r\n",
                       is_rest ? REST_PATH : OPENAI_PATH, ntohs(server.sin_port), body_sizes[k]);
    memcpy(c->out + head, bodies[k], body_sizes[k]);
    c->out_size = head + body_sizes[k];
    c->out_sent = c->line_size = 0;
    c->state = HEAD;
    c->status = c->done_seen = c->error_seen = 0;
    c->events = c->token_events = 0;
    c->first_token_at = 0;
    c->is_busy = 1;
    c->sent_at = now();
    send_rest(c);
}

/* Judge one whole line of an event stream. */
static void take_event_line(struct conn *c, const char *line, size_t size) {
    static const char delta_text[] = "\"content\":\"", chunk_text[] = "\"text\":\"", finished[] = "\"finished\":";
    const char *content = is_rest ? chunk_text : delta_text;
    size_t content_size = strlen(content);
    if (size >= 6 && !memcmp(line, "event:", 6) && memmem(line, size, "error", 5)) c->error_seen = 1;
    if (size < 7 || memcmp(line, "data: ", 6)) return;
    if (line[6] == '[') {
        c->done_seen = 1;
        return;
    }
    c->events++;
    const char *text = memmem(line, size, content, content_size);
    if (!text) {
        if (is_rest && memmem(line, size, finished, sizeof finished - 1)) c->done_seen = 1;
        if (!memcmp(line + 6, "{\"error\"", 8)) c->error_seen = 1;
    } else if (text[content_size] != '"') {
        if (!c->token_events++) c->first_token_at = now();
    }
}

/* Add `size` bytes to the line under way; return the bytes used, and whether they end the line. */
static size_t take_line(struct conn *c, const char *data, size_t size, int *is_whole) {
    const char *newline = memchr(data, '\n', size);
    size_t used = newline ? (size_t)(newline - data) + 1 : size;
    size_t room = LINE_MAX_BYTES - 1 - c->line_size, kept = used < room ? used : room;
    memcpy(c->line + c->line_size, data, kept);
    c->line_size += kept;
    c->line[c->line_size] = 0;
    *is_whole = newline != NULL;
    return used;
}

static void take_body(struct conn *c, const char *data, size_t size) {
    while (size) {
        const char *newline = c->line_size ? NULL : memchr(data, '\n', size);
        size_t used;
        if (newline) { /* the common case: a whole line, judged where it lies */
            used = newline - data + 1;
            take_event_line(c, data, used - 1);
        } else {
            int is_whole;
            used = take_line(c, data, size, &is_whole);
            if (is_whole) take_event_line(c, c->line, c->line_size), c->line_size = 0;
        }
        data += used;
        size -= used;
    }
}

/* The lines of a chunk's size share no buffer with the event lines, which may run on from chunk to chunk. */
static int take_size_digit(struct conn *c, char digit) {
    if (digit == '\n') return 1;
    if (digit != '\r') c->chunk_left = c->chunk_left * 16 + (digit <= '9' ? digit - '0' : (digit | 32) - 'a' + 10);
    return 0;
}

/* Return 1 when the response is whole, -1 when it is none that this client reads. */
static int take(struct conn *c, const char *data, size_t size) {
    while (size) {
        size_t used = 1;
        switch (c->state) {
        case HEAD: {
            int is_whole;
            used = take_line(c, data, size, &is_whole);
            if (!is_whole) break;
            if (!c->status) {
                c->status = atoi(c->line + 9);
                if (c->status != 200) return -1;
            } else if (c->line_size <= 2) {
                c->state = CHUNK_SIZE, c->chunk_left = 0;
            }
            c->line_size = 0;
            break;
        }
        case CHUNK_SIZE:
            if (take_size_digit(c, *data)) c->state = c->chunk_left ? CHUNK : LAST_END;
            break;
        case CHUNK:
            used = size < (size_t)c->chunk_left ? size : (size_t)c->chunk_left;
            take_body(c, data, used);
            if (!(c->chunk_left -= used)) c->state = CHUNK_END;
            break;
        case CHUNK_END:
            if (*data == '\n') c->state = CHUNK_SIZE;
            break;
        case LAST_END:
            if (*data == '\n') return 1;
            break;
        }
        data += used;
        size -= used;
    }
    return 0;
}

static void read_bodies(const char *path) {
    FILE *file = fopen(path, "r");
    char *line = NULL;
    size_t room = 0;
    ssize_t size;
    if (!file) die(path);
    while ((size = getline(&line, &room, file)) > 1) {
        bodies = realloc(bodies, (body_count + 1) * sizeof *bodies);
        body_sizes = realloc(body_sizes, (body_count + 1) * sizeof *body_sizes);
        bodies[body_count] = strndup(line, size - 1);
        body_sizes[body_count++] = size - 1;
    }
    fclose(file);
}

static int ascending(const void *a, const void *b) {
    double x = *(double *)a, y = *(double *)b;
    return x < y ? -1 : x > y;
}

static double percentile_ms(double *sorted, double share) { return good ? sorted[(long)((good - 1) * share)] * 1e3 : 0; }

int main(int argc, char **argv) {
    static char buffer[1 << 17];
    struct epoll_event ready[256];
    is_rest = argc == 6 && !strcmp(argv[5], "rest");
    if (argc != 5 + is_rest) return fprintf(stderr, "usage: %s PORT BODIES CONCURRENCY REQUESTS [rest]\n", argv[0]), 2;
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    read_bodies(argv[2]);
    int concurrency = atoi(argv[3]);
    total = atol(argv[4]);
    quickack = getenv("SSE_QUICKACK") && atoi(getenv("SSE_QUICKACK"));
    ttft_s = calloc(total, sizeof *ttft_s);
    latency_s = calloc(total, sizeof *latency_s);
    epoll_fd = epoll_create1(0);
    struct conn *conns = calloc(concurrency, sizeof *conns);
    double began = now();
    for (int i = 0; i < concurrency; i++) {
        conns[i].fd = -1;
        if (issued < total) start(&conns[i]);
    }
    while (ended < total && now() - began < DEADLINE_S) {
        int count = epoll_wait(epoll_fd, ready, 256, 200);
        for (int i = 0; i < count; i++) {
            struct conn *c = ready[i].data.ptr;
            if (c->is_busy && (ready[i].events & EPOLLOUT)) send_rest(c);
            if (!c->is_busy || !(ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))) continue;
            ssize_t n = read(c->fd, buffer, sizeof buffer);
            int on = 1;
            if (quickack) setsockopt(c->fd, IPPROTO_TCP, TCP_QUICKACK, &on, sizeof on);
            if (n < 0 && errno == EAGAIN) continue;
            if (n > 0) bytes += n;
            int outcome = n <= 0 ? -1 : take(c, buffer, n);
            if (outcome) end(c, outcome > 0 && c->done_seen && !c->error_seen);
        }
    }
    double wall_s = now() - began;
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    qsort(ttft_s, good, sizeof *ttft_s, ascending);
    qsort(latency_s, good, sizeof *latency_s, ascending);
    printf("{\"good\":%ld,\"failed\":%ld,\"wall_s\":%.4f,\"events\":%ld,\"token_events\":%ld,\"bytes\":%ld,"
           "\"ttft_ms_p50\":%.3f,\"ttft_ms_p99\":%.3f,\"latency_ms_p50\":%.3f,\"client_cpu_s\":%.3f}\n",
           good, total - good, wall_s, events, token_events, bytes, percentile_ms(ttft_s, .5), percentile_ms(ttft_s, .99),
           percentile_ms(latency_s, .5),
           used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6);
    return 0;
}
