/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Loads the module of its first argument upon `open`, and unloads it upon `close`.
 *
 *   map    maps the module's file to read it      twice  loads it once more, for itself
 *   plug 3 -> plug(3)                             twin 3 -> plug(3) of the second one
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>

#include "feature.h"

int main(int count, char **arguments)
{
	void *module = NULL;
	long (*plug)(long) = NULL, (*twin)(long) = NULL;
	char word[32];
	long n;

	if (count != 2)
		return 98;
	say_ready();
	while (next_line(word, &n)) {
		if (strcmp(word, "open") == 0) {
			module = dlopen(arguments[1], RTLD_NOW);
			plug = module ? (long (*)(long))dlsym(module, "plug") : NULL;
			puts(plug ? "ok" : dlerror());
		} else if (strcmp(word, "close") == 0) {
			puts(dlclose(module) == 0 ? "ok" : dlerror());
		} else if (strcmp(word, "map") == 0) {
			int file = open(arguments[1], O_RDONLY);
			puts(mmap(NULL, 16384, PROT_READ, MAP_PRIVATE, file, 0) != MAP_FAILED ? "ok" : "not mapped");
		} else if (strcmp(word, "twice") == 0) {
			void *second = dlmopen(LM_ID_NEWLM, arguments[1], RTLD_NOW);
			twin = second ? (long (*)(long))dlsym(second, "plug") : NULL;
			puts(twin ? "ok" : dlerror());
		} else if (strcmp(word, "twin") == 0) {
			printf("%ld\n", twin(n));
		} else if (strcmp(word, "plug") == 0) {
			printf("%ld\n", plug(n));
		} else if (strcmp(word, "feature") == 0) {
			printf("%ld\n", feature(n));
		} else {
			puts("?");
		}
	}
	return 0;
}
