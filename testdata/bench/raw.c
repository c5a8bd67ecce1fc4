/* raw.c is raw.go's loop without Go: posix_spawn, own process group, output read from two pipes, a data file.

     raw TASKS AT_ONCE DATA_BYTES FOLDER COMMAND ARG...

   It prints seconds taken, CPU seconds of its own and of the commands. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static int tasks, at_once;
static size_t data_bytes;
static char *data, *folder, **command;
static atomic_int next;

static void die(const char *what) {
	perror(what);
	exit(1);
}

static void once(int n) {
	char file[4096];
	snprintf(file, sizeof file, "%s/raw-c-%d.json", folder, n);
	int fd = open(file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0 || write(fd, data, data_bytes) != (ssize_t)data_bytes || close(fd))
		die(file);

	int out[2], err[2];
	if (pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC))
		die("pipe2");
	posix_spawn_file_actions_t actions;
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
	posix_spawn_file_actions_adddup2(&actions, out[1], 1);
	posix_spawn_file_actions_adddup2(&actions, err[1], 2);
	posix_spawnattr_t attributes;
	posix_spawnattr_init(&attributes);
	posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
	pid_t pid;
	if (posix_spawnp(&pid, command[0], &actions, &attributes, command, environ))
		die(command[0]);
	posix_spawn_file_actions_destroy(&actions);
	posix_spawnattr_destroy(&attributes);
	close(out[1]);
	close(err[1]);

	struct pollfd ends[2] = {{out[0], POLLIN, 0}, {err[0], POLLIN, 0}};
	for (int open_ends = 2; open_ends > 0;) {
		if (poll(ends, 2, -1) < 0)
			die("poll");
		for (int i = 0; i < 2; i++) {
			char buffer[32768];
			if (ends[i].revents && read(ends[i].fd, buffer, sizeof buffer) <= 0) {
				close(ends[i].fd);
				ends[i].fd = -1;
				open_ends--;
			}
		}
	}
	int status;
	if (waitpid(pid, &status, 0) != pid || status)
		die("waitpid");
	unlink(file);
}

static void *loop(void *unused) {
	for (int n; (n = atomic_fetch_add(&next, 1)) < tasks;)
		once(n);
	return unused;
}

static double cpu(int who) {
	struct rusage use;
	getrusage(who, &use);
	return use.ru_utime.tv_sec + use.ru_stime.tv_sec + (use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1e6;
}

int main(int argc, char **argv) {
	if (argc < 6) {
		fprintf(stderr, "usage: raw TASKS AT_ONCE DATA_BYTES FOLDER COMMAND ARG...\n");
		return 2;
	}
	tasks = atoi(argv[1]);
	at_once = atoi(argv[2]);
	data_bytes = strtoul(argv[3], NULL, 10);
	folder = argv[4];
	command = argv + 5;
	data = malloc(data_bytes);
	pthread_t *threads = calloc(at_once, sizeof *threads);
	if (!data || !threads)
		die("malloc");
	memset(data, 'x', data_bytes);

	struct timespec began, ended;
	clock_gettime(CLOCK_MONOTONIC, &began);
	for (int i = 0; i < at_once; i++)
		if (pthread_create(&threads[i], NULL, loop, NULL))
			die("pthread_create");
	for (int i = 0; i < at_once; i++)
		pthread_join(threads[i], NULL);
	clock_gettime(CLOCK_MONOTONIC, &ended);
	printf("%f %f %f\n", ended.tv_sec - began.tv_sec + (ended.tv_nsec - began.tv_nsec) / 1e9,
	       cpu(RUSAGE_SELF), cpu(RUSAGE_CHILDREN));
}
