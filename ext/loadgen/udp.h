/* What is different about datagrams: replies come in any order, twice, late or never.
 *
 * A message without a reply within the timeout is lost, and counted; nothing ends by that. What
 * comes is told apart by its header: the reply to a message that is waited for, a duplicate of it,
 * the late reply to a lost one, or bytes that are wrong, which are an error. Whatever else it gets,
 * a message is waited for until its own reply or its timeout.
 */
#ifndef KECHO_LOADGEN_UDP_H
#define KECHO_LOADGEN_UDP_H

#include "client.h"

/* As traffic_send and traffic_receive. Without `to_end`, reading stops when no reply is waited
 * for. */
bool udp_send(struct client *client, struct connection *connection);
bool udp_receive(struct client *client, struct connection *connection, bool to_end);

/* The earliest message that is still waited for is lost: sent > replied. */
void udp_lose_first(struct client *client, struct connection *connection, uint64_t now);

/* Loses what has waited too long. */
void udp_tick(struct client *client, struct connection *connection, uint64_t now);

/* The run is over: reads what is there, and what is still waited for is lost. */
void udp_give_up(struct client *client);

#endif
