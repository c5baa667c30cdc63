/* crc.c: CRC-32C, the checksum of checkpoints.
 *
 * Why this sum: a checkpoint that was cut off, or in which bits fell over on a disk or in transport, must not be
 * trained on. CRC-32C finds every single flipped bit, every burst of up to 32 bits and every odd number of flips for
 * sure, and anything else but for one case in 2^32; x86-64 has had an instruction for it since 2008, which runs at
 * memory speed. Rejected: xxHash (a probability where the CRC has a guarantee, and one more package for a first run),
 * SHA-256 (guards against forgers, who can recompute any sum that stands in the file itself, at a tenth of the speed).
 *
 * One stream: the instruction has a latency of 3 cycles for 8 bytes, about 8 GB/s, and disks are slower. Where the
 * instruction is missing, eight tables of 256 entries, made at first use, take 8 bytes a round.
 */
#include "core.h"
#include <pthread.h>
#include <string.h>

static uint32_t table[8][256];
static pthread_once_t table_once = PTHREAD_ONCE_INIT;

static void make_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = c & 1 ? (c >> 1) ^ 0x82f63b78u : c >> 1;
        table[0][i] = c;
    }
    for (int t = 1; t < 8; t++)
        for (int i = 0; i < 256; i++) table[t][i] = (table[t - 1][i] >> 8) ^ table[0][table[t - 1][i] & 255];
}

static uint32_t crc_tables(uint32_t crc, const unsigned char *p, size_t n)
{
    pthread_once(&table_once, make_table);
    for (; n >= 8; p += 8, n -= 8) {
        uint32_t low = crc ^ ((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
        crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^ table[4][low >> 24];
        crc ^= table[3][p[4]] ^ table[2][p[5]] ^ table[1][p[6]] ^ table[0][p[7]];
    }
    for (; n; p++, n--) crc = table[0][(crc ^ *p) & 255] ^ (crc >> 8);
    return crc;
}

#ifdef LAC_HAVE_AVX
__attribute__((target("sse4.2"))) static uint32_t crc_instruction(uint32_t crc, const unsigned char *p, size_t n)
{
    uint64_t c = crc;
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        c = __builtin_ia32_crc32di(c, word);
    }
    for (; n; p++, n--) c = __builtin_ia32_crc32qi((uint32_t)c, *p);
    return (uint32_t)c;
}
#endif

uint32_t lac_crc32c(uint32_t crc, const void *data, int64_t bytes)
{
    if (!data || bytes <= 0) return crc;
#ifdef LAC_HAVE_AVX
    static const char *const portable = "baseline"; /* lac_isa("baseline") also tests the tables */
    const char *isa = lac_isa(NULL);
    if (__builtin_cpu_supports("sse4.2") && (!isa || strncmp(isa, portable, 8) != 0))
        return ~crc_instruction(~crc, data, (size_t)bytes);
#endif
    return ~crc_tables(~crc, data, (size_t)bytes);
}
