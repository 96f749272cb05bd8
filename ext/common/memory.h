/* Records that several threads write lie in cache lines of their own. */
#ifndef KECHO_COMMON_MEMORY_H
#define KECHO_COMMON_MEMORY_H

#define KECHO_CACHE_LINE 64

#endif
