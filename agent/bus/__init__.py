"""The message bus behind one interface (`base`): `amqp` for RabbitMQ, `memory` for one process."""
