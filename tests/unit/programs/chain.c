/* Dispatch by a chain of if and else, as in nginx's dav handler. The exit status is the reply. */
#include <string.h>
#define APART __attribute__((noinline))
volatile int work, readonly;
APART static int put(void) { for (int i = 0; i < 3; i++) work += i; return 20; }
APART static int get(void) { work = 1; return 10; }
APART static int erase(void) { work *= 3; return 30; }
APART static int refuse(void) { work = 9; return 45; }
APART static int dispatch(int method) {
    work++;
    if (readonly && (method == 7 || method == 23)) return refuse() + 0 * work;
    if (method == 7) { int status = put(); work++; return status; }
    if (method == 23) { int status = erase(); work--; return status; }
    if (method == 2) { int status = get(); work -= 2; return status; }
    return refuse();
}
int main(int count, char **words) {
    readonly = count > 2;
    int method = !strcmp(words[1], "GET") ? 2 : !strcmp(words[1], "PUT") ? 7 : !strcmp(words[1], "DELETE") ? 23 : 1;
    return dispatch(method);
}
