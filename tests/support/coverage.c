/* coverage.c: the line hook of coverage.lua, which loads this file's library.
 *
 * The hook is called for every line that runs, in the specs too, and is nearly all of what they cost then: in Lua it
 * asks for a table each time. Here a line is a byte: the file is found by where its name lies in memory, and compared,
 * because names of chunks may be freed and their place used again. Chunks of a text (names without @) are no files:
 * there may be any number of them, and none gets a place.
 */
#include <lauxlib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FILES = 4096, LINES = 1024 }; /* no file of the library is longer than 900 lines */

typedef struct {
    const char *at;
    char name[128];  /* as Lua has it, as far as it fits */
    const char *own; /* from lua/lacuna/ on; NULL: not of the library */
    unsigned char ran[LINES];
} source;

static source files[FILES];

static source *file_of(const char *name)
{
    size_t slot = (size_t)name / 8 % FILES;
    for (int tried = 0; tried < FILES; tried++, slot = (slot + 1) % FILES) { /* of hundreds of files */
        source *f = &files[slot];
        if (f->at == name && strncmp(f->name, name, sizeof f->name - 1) == 0) return f;
        if (f->at) continue;
        f->at = name;
        strncpy(f->name, name, sizeof f->name - 1);
        f->own = strstr(f->name, "lua/lacuna/");
        return f;
    }
    fprintf(stderr, "coverage.c: more than %d names of files: make FILES larger\n", FILES);
    abort();
}

static void line_ran(lua_State *L, lua_Debug *ar)
{
    if (!lua_getinfo(L, "S", ar) || ar->source[0] != '@') return;
    source *f = file_of(ar->source);
    if (f->own && ar->currentline >= 0 && ar->currentline < LINES) f->ran[ar->currentline] = 1;
}

int coverage_start(lua_State *L);
int coverage_start(lua_State *L)
{
    lua_sethook(L, line_ran, LUA_MASKLINE, 0);
    return 0;
}

/* coverage_write(path) */
int coverage_write(lua_State *L);
int coverage_write(lua_State *L)
{
    lua_sethook(L, NULL, 0, 0);
    FILE *out = fopen(luaL_checkstring(L, 1), "w");
    for (int i = 0; out && i < FILES; i++)
        for (int line = 0; files[i].own && line < LINES; line++)
            if (files[i].ran[line]) fprintf(out, "%s:%d\n", files[i].own, line);
    lua_pushboolean(L, out && fclose(out) == 0);
    return 1;
}
