/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Loads the module of its first argument upon `open`, and unloads it upon `close`.
 */
#define _GNU_SOURCE
#include <dlfcn.h>

#include "feature.h"

int main(int count, char **arguments)
{
	void *module = NULL;
	long (*plug)(long) = NULL;
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
