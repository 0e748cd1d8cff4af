/* Rewrites one block of a file for as long as it lives: now as it was, now with another byte in it.
 *
 *     writer FILE OFFSET BYTE HOW          HOW: write, mmap, direct, splice, uring
 *
 * The file is opened, and mapped, once and at the start, as by somebody who gives it out of hand afterwards.
 * "ready" on standard output says that the first round is done. */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BLOCK 4096

static int file, channel[2], ring;
static off_t offset;
static char *mapped;
static struct io_uring_params parameters;
static char *submissions, *completions;
static struct io_uring_sqe *entries;

static void by_write(const char *block)
{
	if (pwrite(file, block, BLOCK, offset) != BLOCK)
		err(1, "pwrite");
}

static void by_mmap(const char *block)
{
	memcpy(mapped, block, BLOCK);
}

static void by_splice(const char *block)
{
	loff_t at = offset;
	if (write(channel[1], block, BLOCK) != BLOCK || splice(channel[0], NULL, file, &at, BLOCK, 0) != BLOCK)
		err(1, "splice");
}

static void start_ring(void)
{
	ring = syscall(__NR_io_uring_setup, 4, &parameters);
	if (ring < 0)
		err(1, "io_uring_setup");
	submissions = mmap(NULL, parameters.sq_off.array + parameters.sq_entries * sizeof(unsigned),
			   PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
	completions = mmap(NULL, parameters.cq_off.cqes + parameters.cq_entries * sizeof(struct io_uring_cqe),
			   PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_CQ_RING);
	entries = mmap(NULL, parameters.sq_entries * sizeof(*entries), PROT_READ | PROT_WRITE, MAP_SHARED, ring,
		       IORING_OFF_SQES);
	if (submissions == MAP_FAILED || completions == MAP_FAILED || entries == MAP_FAILED)
		err(1, "mmap of the ring");
}

static void by_uring(const char *block)
{
	unsigned *tail = (unsigned *)(submissions + parameters.sq_off.tail);
	unsigned *head = (unsigned *)(completions + parameters.cq_off.head);
	unsigned mask = *(unsigned *)(submissions + parameters.sq_off.ring_mask);
	unsigned seen = *(unsigned *)(completions + parameters.cq_off.ring_mask);
	struct io_uring_cqe *done = (struct io_uring_cqe *)(completions + parameters.cq_off.cqes) + (*head & seen);
	struct io_uring_sqe *entry = &entries[*tail & mask];

	memset(entry, 0, sizeof(*entry));
	entry->opcode = IORING_OP_WRITE;
	entry->fd = file;
	entry->addr = (unsigned long)block;
	entry->len = BLOCK;
	entry->off = offset;
	((unsigned *)(submissions + parameters.sq_off.array))[*tail & mask] = *tail & mask;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	if (syscall(__NR_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
		err(1, "io_uring_enter");
	if (done->res != BLOCK)
		errx(1, "a write by io_uring: %d", done->res);
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
}

int main(int count, char **arguments)
{
	char *blocks;
	const char *how = count == 5 ? arguments[4] : "";
	void (*put)(const char *) = by_write;

	if (count != 5)
		errx(2, "usage: writer FILE OFFSET BYTE HOW");
	offset = atol(arguments[2]);
	file = open(arguments[1], O_RDWR | (strcmp(how, "direct") == 0 ? O_DIRECT : 0));
	if (file < 0 || posix_memalign((void **)&blocks, BLOCK, 2 * BLOCK) != 0)
		err(1, "%s", arguments[1]);
	if (pread(file, blocks, BLOCK, offset) != BLOCK)
		err(1, "pread");
	memcpy(blocks + BLOCK, blocks, BLOCK);
	blocks[BLOCK + atol(arguments[3])] ^= 0x20;
	if (strcmp(how, "mmap") == 0) {
		mapped = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED, file, offset);
		if (mapped == MAP_FAILED)
			err(1, "mmap");
		put = by_mmap;
	} else if (strcmp(how, "splice") == 0) {
		if (pipe(channel) < 0)
			err(1, "pipe");
		put = by_splice;
	} else if (strcmp(how, "uring") == 0) {
		start_ring();
		put = by_uring;
	} else if (strcmp(how, "write") != 0 && strcmp(how, "direct") != 0) {
		errx(2, "no such way to write: %s", how);
	}
	for (unsigned round = 0;; round++) {
		put(blocks + BLOCK * (round % 2));
		if (round == 1 && write(1, "ready\n", 6) != 6)
			err(1, "write");
		/* Long enough for a whole look at it now and then. */
		usleep(rand() % 1500);
	}
}
