/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Names that only a debugger knows: members with overloads, and a static function of a file.
 *
 *   area 3    -> 9        scaled 3  -> 30       hidden 3  -> 1003
 */
#include <cstdio>
#include <cstring>

#define NOIPA __attribute__((noipa, used))

namespace geometry {
struct Square {
	long side;
	NOIPA long area() const { return side * side; }
	NOIPA long area(long factor) const { return side * factor; }
};
}

static NOIPA long hidden(long n)
{
	return n + 1000; /* the only code of this line */
}

int main()
{
	char word[32];
	long number;

	puts("ready");
	fflush(stdout);
	while (scanf("%31s %ld", word, &number) == 2) {
		geometry::Square square{number};
		long result = !strcmp(word, "area") ? square.area() : !strcmp(word, "scaled") ? square.area(10) : hidden(number);
		printf("%ld\n", result);
		fflush(stdout);
	}
	return 0;
}
